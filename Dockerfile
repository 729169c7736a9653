# petractl on a GPU, or on the CPU where the container gets none:
#
#   docker build -t petractl .
#   docker run --rm --gpus all -v "$PWD/data:/workspace/data" -v "$PWD/runs:/workspace/runs" \
#       petractl run cifar10_revnet18

# torch's wheels bring cuBLAS, cuDNN, NCCL and the CUDA runtime of their own, so the smallest flavour is enough:
# `base` adds what lets a container see the GPU and run on an older driver, `runtime` would hold every library twice.
# Its major version is that of the CUDA which torch's wheels are built for.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Numeric id of the user in the container; the owner of mounted folders should have it too.
ARG UID=1000

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PATH=/opt/venv/bin:$PATH \
    USER=petractl \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/cache/matplotlib

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

# The dependencies, gigabytes of them, are a layer that only a change of pyproject.toml builds anew. One stage only:
# copying the environment out of a builder stage would put them back into the layer that every change replaces.
WORKDIR /opt/petractl
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install --requirement requirements.txt

# The recipes are installed with the package: `petractl run digits_revnet18` finds them in any folder.
COPY README.md LICENSE ./
COPY recipes/ recipes/
COPY petractl/ petractl/
RUN pip install --no-deps .

# Ubuntu's images hold a user `ubuntu` with the id 1000.
RUN if id ubuntu > /dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --uid "$UID" --user-group --create-home petractl \
    && install --directory --owner petractl --group petractl \
        /workspace /workspace/data /workspace/runs
USER petractl
WORKDIR /workspace
VOLUME ["/workspace/data", "/workspace/runs"]

ENTRYPOINT ["petractl"]
CMD ["--help"]
