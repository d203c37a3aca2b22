# The image that launch/ expects: the repository at /moe_ablm, installed in the system's Python.
#
#   docker build --tag moe_ablm .                              # CPU
#   docker build --tag moe_ablm:cuda --build-arg EXTRAS=cuda12 .
#   docker build --tag moe_ablm:tpu --build-arg EXTRAS=tpu .
#
# jax's wheels bring CUDA and cuDNN; the host needs NVIDIA's driver and container toolkit.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

# dependencies first: a change of the code alone does not install them again
WORKDIR /moe_ablm
COPY setup.py pyproject.toml README.md ./
RUN mkdir moe_ablm configs launch sweeps \
    && python3 -m pip install --editable ".${EXTRAS:+[${EXTRAS}]}"
COPY . .
RUN python3 -m pip install --no-deps --editable .

# pods run as any user: compiled programs and figures' caches go where all may write
ENV XDG_CACHE_HOME=/tmp/cache MPLCONFIGDIR=/tmp/cache/matplotlib
ENTRYPOINT []
CMD ["python3", "-m", "moe_ablm", "--help"]
