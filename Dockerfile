# Potstill with all that a node needs, for Kubernetes (docs/cluster.md). Not yet built.
#     docker build --target cpu  -t potstill:cpu .
#     docker build --target cuda -t potstill:cuda .
# Python packages come from the locks by requirements/install.sh, CUDA's libraries among them; NVIDIA's
# driver comes from the machine. The image holds no secret, and its user is not root.
FROM python:3.11-slim-bookworm AS base

# A compiler for what vLLM and Triton build at their start, libnuma for vLLM on a CPU, wget for the
# probes of older KubeRays.
RUN apt-get update && \
    apt-get install --yes --no-install-recommends build-essential libnuma1 wget && \
    rm -rf /var/lib/apt/lists/* && \
    useradd --create-home --uid 1000 potstill

WORKDIR /home/potstill/app
RUN chown potstill:potstill /home/potstill/app
USER 1000
COPY --chown=1000:1000 requirements requirements
COPY --chown=1000:1000 pyproject.toml README.md LICENSE potstill.py ./
COPY --chown=1000:1000 cluster cluster
COPY --chown=1000:1000 pipeline pipeline
COPY --chown=1000:1000 training training
COPY --chown=1000:1000 serving serving
COPY --chown=1000:1000 evals evals
COPY --chown=1000:1000 configs configs

# Whatever Ray is started here asks for a token; the rest is what a run sets for its own processes.
ENV PATH=/home/potstill/app/.venv/bin:$PATH \
    RAY_AUTH_MODE=token \
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1 \
    TOKENIZERS_PARALLELISM=false

FROM base AS cpu
RUN --mount=type=cache,target=/home/potstill/.cache/pip,uid=1000,gid=1000 \
    sh requirements/install.sh cpu

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN --mount=type=cache,target=/home/potstill/.cache/pip,uid=1000,gid=1000 \
    sh requirements/install.sh gpu
