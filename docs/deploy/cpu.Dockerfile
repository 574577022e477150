# sd-serve and sd-run on a CPU, without torch. From the root of the repository:
#   docker build --file docs/deploy/cpu.Dockerfile --tag sd-toolkit:cpu .
#   docker run --stop-timeout 120 --read-only --tmpfs /cache --volume /srv/sd14.bundle:/bundle:ro --publish 127.0.0.1:8000:8000 sd-toolkit:cpu
# It listens on all addresses of the container: publish it to a proxy, and give it a key.
FROM python:3.12.12-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY engines/sd_engines engines/sd_engines
COPY runtime/sd_runtime runtime/sd_runtime
COPY export/sd_export export/sd_export
COPY benchmarks/sd_bench benchmarks/sd_bench
RUN python -m venv /opt/sd-toolkit && /opt/sd-toolkit/bin/pip install --no-cache-dir ".[cpu,serve]"

FROM python:3.12.12-slim-bookworm
COPY --from=build /opt/sd-toolkit /opt/sd-toolkit
ENV PATH=/opt/sd-toolkit/bin:$PATH XDG_CACHE_HOME=/cache PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready, not only alive: a container that drains is to get no more requests.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
ENTRYPOINT ["sd-serve", "/bundle", "--host", "0.0.0.0", "--log-format", "json"]
