# docker build -t keeplora .                                                         CUDA, as PyPI's torch has it
# docker build -t keeplora --build-arg PIP_EXTRA_INDEX_URL=URL_OF_CPU_BUILDS_OF_TORCH .  without CUDA's libraries
# docker run --rm -it --gpus all --shm-size 8g -v "$PWD":/data keeplora run          without --gpus on a CPU
#
# The environment is that of scripts/_setup.sh, from constraints.txt. This image has not been built yet.
FROM python:3.11-slim

# pip reads these from the environment of a RUN; nothing of them stays in the image.
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_NO_CACHE_DIR=1

WORKDIR /keeplora
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts scripts
COPY mllm_keeplora mllm_keeplora
COPY recipes recipes
COPY eval eval
COPY studies studies
RUN bash -c '. scripts/_setup.sh && setup_environment && "$PYTHON" -m mllm_keeplora.commands.main --version'

# Data, runs, bases and what the hub sends lie in the folder that is mounted here.
WORKDIR /data
ENV PATH=/keeplora/.venv/bin:$PATH HF_HOME=/data/cache/huggingface PYTORCH_ALLOC_CONF=expandable_segments:True
ENTRYPOINT ["keeplora"]
CMD ["--help"]
