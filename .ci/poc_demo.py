"""The proof of concept with real services: hello-pt on PostgreSQL, an S3 server and a worker
process per site, then in simulation.

Both runs must produce the same bytes in every round. Needs PostgreSQL's programs, and stops
everything that it starts.
"""

import runpy
import sys
import tempfile
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples/hello-pt")]

from fedpool import PocEnv, SimEnv, Store  # noqa: E402
from fedpool.paths import JobPaths  # noqa: E402
from tests.services import PostgresServer  # noqa: E402


def main() -> None:
    """Run the job twice and compare."""
    recipe = runpy.run_path(str(ROOT / "examples/hello-pt/job.py"))["recipe"]
    with tempfile.TemporaryDirectory() as folder, closing(PostgresServer()) as postgres:
        poc = PocEnv(num_clients=3, database=postgres.url, s3=True, home=Path(folder) / "poc")
        try:
            run = recipe.execute(env=poc)
            result = run.get_result()
            store = poc.open_store()
            there = [store.read_bytes(JobPaths(run.job_id).global_model(n)) for n in range(result.num_rounds + 1)]
        finally:
            poc.down()
        simulated = recipe.execute(env=SimEnv(num_clients=3, workspace=Path(folder) / "sim"))
        local = Store(Path(folder) / "sim")
        here = [local.read_bytes(JobPaths(simulated.job_id).global_model(n)) for n in range(result.num_rounds + 1)]
    if there != here:
        sys.exit("the proof of concept and the simulation ended with different bytes")
    print(f"accuracy of the final model: {result.metrics[-1]['accuracy']:.4f}")
    print(f"{len(here)} global models, byte-identical in the proof of concept and in simulation")


if __name__ == "__main__":
    main()
