FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY falproxy falproxy
RUN python -m venv /opt/falproxy \
    && /opt/falproxy/bin/pip install --no-cache-dir '.[sandbox,docs,redis,supabase,postgres,jwt]'

FROM python:3.13-slim
RUN useradd --system --create-home --home-dir /data falproxy
COPY --from=build /opt/falproxy /opt/falproxy
ENV PATH=/opt/falproxy/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FALPROXY_HOST=0.0.0.0 \
    FALPROXY_REQUIRE_AUTH=1
USER falproxy
WORKDIR /data
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + (os.environ.get('FALPROXY_PORT') or os.environ.get('PORT') or '8080') + '/health/ready', timeout=2)"]
# SIGTERM lets running calls finish for FALPROXY_DRAIN seconds; give the container a little more.
STOPSIGNAL SIGTERM
CMD ["falproxy", "serve"]
