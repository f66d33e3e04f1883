"""What people read: report, pages and model cards."""
