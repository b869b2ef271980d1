"""A job of Ray Data in a process of its own, to be killed: ray_job.py ADDRESS SOURCE OUTPUT MODEL_FOLDER"""

import logging
import sys

import ray
from ray_cluster import WORKER

from jaxpaged.ray import run_batch

CONFIG = {"load_format": "dummy", "enforce_eager": True, "max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 64}
PARAMS = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}


def main(address: str, source: str, output: str, model: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    ray.init(address=address, logging_level="warning", log_to_driver=False, runtime_env={"env_vars": WORKER})
    print(run_batch(source, output, {"model": model, **CONFIG}, PARAMS, batch_size=50, num_cpus=0.8, concurrency=2), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
