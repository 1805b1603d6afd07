# TensorRT, onnxruntime-gpu, PyCUDA and PyTorch for NVIDIA GPUs; needs driver 580 or newer on the host.
#   docker build -f docker/gpu.Dockerfile -t deploycnn:gpu .
#   docker run --rm --gpus all --user "$(id -u)" -e HOME=/tmp -v "$PWD:/work" deploycnn:gpu doctor
ARG CUDA_TAG=13.0.2
ARG UBUNTU_TAG=ubuntu24.04

FROM nvidia/cuda:${CUDA_TAG}-devel-${UBUNTU_TAG} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# PyCUDA is compiled here, against this image's toolkit. The archive keeps one version of each package for a release.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:/usr/local/cuda/bin:$PATH CUDA_ROOT=/usr/local/cuda
WORKDIR /src
# The heavy layers depend on the pinned versions only: CUDA's libraries come with PyTorch's wheel.
COPY docker/constraints.txt docker/
RUN pip install --no-cache-dir -c docker/constraints.txt torch torchvision
# Layers of their own, so that one changed version does not fetch all of it again.
# hadolint ignore=DL3059
RUN pip install --no-cache-dir -c docker/constraints.txt onnxruntime-gpu tensorrt-cu13 nvidia-ml-py pycuda setuptools
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY deploycnn deploycnn
RUN pip install --no-cache-dir -c docker/constraints.txt ".[gpu,pycuda,timm]"

FROM nvidia/cuda:${CUDA_TAG}-base-${UBUNTU_TAG}
# torch.compile needs a compiler and Python's headers on GPUs too. libcurand: PyCUDA is linked against it.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ libcurand-13-0 python3 python3-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 deploycnn \
 && install -d -o deploycnn -g deploycnn /work
COPY --from=build /opt/venv /opt/venv
# `utility` gives NVML, which tells clocks, temperature and throttling.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
WORKDIR /work
# Loads every runtime and runs a tiny model on it, hence the time; its exit code is 1 where something is broken.
HEALTHCHECK --interval=10m --timeout=5m --start-period=2m --retries=2 CMD ["deploycnn", "doctor"]
ENTRYPOINT ["deploycnn"]
CMD ["--help"]
