# The steps of the README. It could not be built where it was written (no container runtime).
#
#   docker build --tag galaxy-mae .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --env HOME=/work --volume "$PWD:/work" galaxy-mae \
#       predict --dataset my_galaxies/ --output my_galaxies.parquet
#
# On Linux the index's PyTorch brings CUDA. For a smaller image without a GPU, add to the first pip install:
# --extra-index-url https://download.pytorch.org/whl/cpu
# Not python:3.11-slim: torch.compile, the default on a GPU, needs a C compiler.
FROM python:3.11
COPY . /opt/galaxy-mae
RUN cd /opt/galaxy-mae \
    && pip install --no-cache-dir -r requirements.txt -c constraints.txt \
    && pip install --no-cache-dir --no-deps .
WORKDIR /work
ENTRYPOINT ["galaxy-mae"]
