# The versions of all packages, with hashes, are in deploy/image (`make lock`).
FROM python:3.13-slim AS build
WORKDIR /src
COPY deploy/image ./
# Wheels only: nothing but falproxy itself is built, and that with a pinned setuptools.
RUN python -m venv /opt/falproxy \
    && /opt/falproxy/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r requirements.txt \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r build-requirements.txt
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY falproxy falproxy
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheel . \
    && /opt/falproxy/bin/pip install --no-deps --no-index /opt/wheel/*.whl

FROM python:3.13-slim
# Any user id may run the image: what it writes is in /data, which is writable for the group 0 that
# containers with another user id have. The root file system may be read-only.
RUN useradd --system --uid 999 --gid 0 --no-create-home --home-dir /data falproxy \
    && install --directory --owner 999 --group 0 --mode 0770 /data
COPY --from=build /opt/falproxy /opt/falproxy
ENV PATH=/opt/falproxy/bin:$PATH \
    HOME=/data \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    FALPROXY_HOST=0.0.0.0 \
    FALPROXY_REQUIRE_AUTH=1
# A number, so that Kubernetes can see that it is not root.
USER 999:0
WORKDIR /data
# Also the folder of temporary files, unless /tmp is writable.
VOLUME /data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + (os.environ.get('FALPROXY_PORT') or os.environ.get('PORT') or '8080') + '/health/ready', timeout=2)"]
# SIGTERM lets running calls finish for FALPROXY_DRAIN seconds; give the container a little more.
STOPSIGNAL SIGTERM
CMD ["falproxy", "serve"]
