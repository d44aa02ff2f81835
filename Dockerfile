# The GPU image by default. For CPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY server server
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${PYTHON_IMAGE}

# The dependencies are a layer of their own: gigabytes that a change of the source does not touch.
ARG TORCH_INDEX=
WORKDIR /opt/skippy
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
RUN --mount=type=bind,from=wheel,source=/dist,target=/dist \
    pip install --no-cache-dir --no-deps /dist/*.whl

# A named volume takes over the owner of the folder it is mounted on, so the folder must exist and be the user's.
RUN useradd --create-home --uid 1000 skippy \
    && install --directory --owner=skippy --group=skippy /home/skippy/.cache
USER 1000:1000
WORKDIR /home/skippy
ENV PYTHONUNBUFFERED=1 \
    SKIPPY_HOST=0.0.0.0
# Models of the hub, and the plans of `skippy tune`.
VOLUME /home/skippy/.cache

EXPOSE 8000
# A model that has to be downloaded, or read from a slow disk, takes its time before the first 200.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + (os.environ.get('SKIPPY_PORT') or '8000') + '/health', timeout=4)"]
ENTRYPOINT ["skippy"]
CMD ["serve"]
