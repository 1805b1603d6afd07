# onnxruntime, OpenVINO and PyTorch on the CPU.
#   docker build -f docker/cpu.Dockerfile -t deploycnn:cpu .
#   docker run --rm --user "$(id -u)" -e HOME=/tmp -v "$PWD:/work" deploycnn:cpu compress digits-resnet20
ARG PYTHON_TAG=3.12.8-slim-bookworm

FROM python:${PYTHON_TAG} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
# The heavy layer depends on the pinned versions only. PyTorch without CUDA is a tenth of the size.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY docker/constraints.txt docker/
RUN grep -E '^(torch|torchvision)==' docker/constraints.txt > /tmp/torch.txt \
 && pip install --no-cache-dir --index-url "${TORCH_INDEX}" -r /tmp/torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY deploycnn deploycnn
RUN pip install --no-cache-dir -c docker/constraints.txt ".[cpu,openvino,timm]"

FROM python:${PYTHON_TAG}
# torch.compile needs a C++ compiler. The archive keeps one version of each package for a release.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 deploycnn \
 && install -d -o deploycnn -g deploycnn /work
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /work
# Loads every runtime and runs a tiny model on it, hence the time; its exit code is 1 where something is broken.
HEALTHCHECK --interval=10m --timeout=5m --start-period=1m --retries=2 CMD ["deploycnn", "doctor"]
ENTRYPOINT ["deploycnn"]
CMD ["--help"]
