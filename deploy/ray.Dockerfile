# The image of ray-service.yaml: Ray's own, as KubeRay expects it, with fastvlm-convert. From the root of the repository:
#   docker build --file deploy/ray.Dockerfile --tag fastvlm-ray .
ARG BASE=docker.io/rayproject/ray:2.60.0-py311
FROM ${BASE}
COPY . /tmp/source
RUN pip install --no-cache-dir --disable-pip-version-check --constraint /tmp/source/constraints.txt '/tmp/source[onnx,serve,ray]'
ENV RAY_USAGE_STATS_ENABLED=0
