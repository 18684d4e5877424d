# syntax=docker/dockerfile:1
#
# GPU nodes: Ray, vLLM for CUDA, Relight. No weights: those come to the node's disk when a model is first lit.
#
#   docker build -f cluster-configs/docker/cuda.Dockerfile -t ghcr.io/OWNER/relight:cuda .
#
# Layers go from what changes once a year to what changes every day, so that a node that has yesterday's image pulls
# a megabyte. The driver is the machine's; CUDA's libraries are in the wheels, so that the base needs none.
FROM python:3.11-slim-bookworm

# gcc: Triton and torch.compile build kernels where they run. rsync and ssh: `ray up` brings files with them. Versions are
# the distribution's, for its security fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libc6-dev libnuma1 openssh-client procps rsync \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 ray \
    && install -d -o ray -g ray /mnt/relight /data

# The engine: the largest layer by far, and the same until a version is bumped. Complete and held to its hashes; without
# a resolver, which would look for what is left out on purpose.
COPY requirements/cuda.txt /build/requirements/
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps --require-hashes -r /build/requirements/cuda.txt

# Relight itself.
COPY pyproject.toml README.md LICENSE /build/
COPY deployments /build/deployments
COPY autoscaling /build/autoscaling
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --no-build-isolation /build

# Weights, and what vLLM, torch and Triton compiled, are on a volume: they outlive the container, and the next start of a
# model compiles nothing. The driver's libraries are mounted by NVIDIA's container runtime.
ENV RELIGHT_CACHE=/mnt/relight/models \
    VLLM_CACHE_ROOT=/mnt/relight/vllm \
    TORCHINDUCTOR_CACHE_DIR=/mnt/relight/torchinductor \
    TRITON_CACHE_DIR=/mnt/relight/triton \
    HF_HOME=/mnt/relight/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    PYTHONUNBUFFERED=1
VOLUME ["/mnt/relight"]
USER 1000:1000
WORKDIR /home/ray
