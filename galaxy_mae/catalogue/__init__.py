"""What people take away: catalogues of their own galaxies, similar and odd galaxies, model cards."""
