"""jaxpaged on Ray: many replicas that answer HTTP (Ray Serve), and offline batches that go on where they stopped (Ray Data).

    serve_app(config, server)    a Ray Serve application: OpenAI's API over replicas of one engine each
    app                          the same for `serve run jaxpaged.ray:app model=demo max_replicas=4` and for a RayService
    Generate                     a callable class for `dataset.map_batches`: adds what a model generates
    run_batch(source, folder)    prompts of files or a dataset -> Parquet files; a second call computes what is missing

Needs `pip install "jaxpaged[ray]"`. Ray itself is imported inside functions.
"""

from __future__ import annotations

from jaxpaged.ray.batch import Report, run_batch
from jaxpaged.ray.serving import app, serve_app
from jaxpaged.ray.sizes import Sizes
from jaxpaged.ray.stage import Generate, generate_stage

__all__ = ["Generate", "Report", "Sizes", "app", "generate_stage", "run_batch", "serve_app"]
