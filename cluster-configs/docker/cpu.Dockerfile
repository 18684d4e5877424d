# syntax=docker/dockerfile:1
#
# The head, and nodes without GPUs: Ray, vLLM for CPUs, Relight, and what Ray needs to ask a cloud for machines. No weights.
#
#   docker build -f cluster-configs/docker/cpu.Dockerfile --build-arg CLOUD=aws -t ghcr.io/OWNER/relight:cpu .
#
# CLOUD is aws, gcp, azure, or none for Kubernetes, whose operator brings what it needs.
FROM python:3.11-slim-bookworm

# gcc: torch.compile builds kernels where they run. rsync and ssh: `ray up`, and the head after it, bring files with them.
# Versions are the distribution's, for its security fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libc6-dev libnuma1 openssh-client procps rsync \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray \
    && install -d -o ray -g ray /mnt/relight /data

# The engine: torch from PyTorch's own index, since PyPI has none for CPUs alone; the rest held to its hashes.
COPY requirements/torch-cpu.txt requirements/cpu.txt /build/requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu -r /build/requirements/torch-cpu.txt \
    && pip install --no-deps --require-hashes -r /build/requirements/cpu.txt

# How Ray's autoscaler, on the head, starts and ends machines.
ARG CLOUD=none
COPY cluster-configs/docker/clouds /build/clouds
RUN --mount=type=cache,target=/root/.cache/pip pip install -r "/build/clouds/${CLOUD}.txt"

# Relight itself.
COPY pyproject.toml README.md LICENSE /build/
COPY deployments /build/deployments
COPY autoscaling /build/autoscaling
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --no-build-isolation /build

# Weights, and what vLLM and torch compiled, are on a volume and outlive the container; so is what the controller knows.
ENV RELIGHT_CACHE=/mnt/relight/models \
    VLLM_CACHE_ROOT=/mnt/relight/vllm \
    TORCHINDUCTOR_CACHE_DIR=/mnt/relight/torchinductor \
    HF_HOME=/mnt/relight/huggingface \
    RELIGHT_DATA=/data \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    PYTHONUNBUFFERED=1
VOLUME ["/mnt/relight", "/data"]
USER 1000:1000
WORKDIR /home/ray
