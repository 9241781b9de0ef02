"""Run one job as a proof of concept, with a process per site, and print each round's overhead.

Training is a sleep of 3 s, so that sites don't compete for the processors. A round's time is the
time between the first site receiving it and receiving the next round; its overhead is that time
minus 3 s.
"""

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from measure import BEFORE, PEERS, Case, Engine, EngineError, Sample, find_pythons, run_engine
from tables import report_overheads

TRAINING_S = 3.0  # as in engines/sleeping.py
ENGINES = {
    "fedpool": Engine("poc_fedpool_job.py", arguments=("--look-ahead", "4")),
    "fedpool-no-look-ahead": Engine("poc_fedpool_job.py", arguments=("--look-ahead", "0")),
    "fedpool-before": Engine("poc_fedpool_job.py", peer=BEFORE, arguments=("--look-ahead", "4")),
    "nvflare": Engine("poc_nvflare_job.py", peer="nvflare"),
    "flower": Engine("poc_flower_job.py", peer="flower"),
}


def main() -> None:
    """Run every engine with every number of sites, print the table, and exit with 1 if one
    failed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # runs the clean-up, because engines have daemons
    arguments = _arguments()
    pythons = find_pythons({name: ENGINES[name] for name in arguments.engines}, arguments.peer_venvs)
    results: dict[Case, dict[str, list[Sample]]] = {}
    failures = 0
    for num_sites in arguments.sites:
        case = Case("poc", "sleep", num_sites, arguments.rounds)
        names = [name for name in arguments.engines if name != "nvflare" or num_sites <= arguments.nvflare_sites]
        results[case] = {name: [] for name in names}
        for repeat in range(arguments.repeat):  # engine after engine, so that a slow minute affects all of them
            for name in names:
                _note(f"{num_sites} sites: {name}, run {repeat + 1} of {arguments.repeat}")
                try:
                    sample = run_engine(ENGINES[name], case, pythons[name], num_sites, arguments.timeout_s)
                    results[case][name].append(sample)
                    _note("  overheads s: " + " ".join(f"{second - TRAINING_S:.2f}" for second in sample.round_s))
                except EngineError as error:
                    failures += 1
                    _note(f"{name} failed: {error}")
    print("\n".join(report_overheads(results, training_s=TRAINING_S)), flush=True)
    if arguments.json:
        runs = [
            {**asdict(case), "engine": name, **asdict(sample)}
            for case, engines in results.items()
            for name, samples in engines.items()
            for sample in samples
        ]
        arguments.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    sys.exit(failures > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=1, help="runs of every engine; the table has their medians")
    parser.add_argument("--peers", action="store_true", help="also NVFlare and Flower")
    parser.add_argument(
        "--nvflare-sites", type=int, default=4, help="most sites for NVFlare, which starts two processes per site"
    )
    parser.add_argument("--engines", type=lambda text: text.split(","), help=f"only these, of {','.join(ENGINES)}")
    parser.add_argument(
        "--peer-venvs",
        type=Path,
        default=Path(__file__).resolve().parents[1] / ".venvs",
        help="folder with the virtual environments nvflare/, flower/ and before/",
    )
    parser.add_argument("--timeout-s", type=float, default=900)
    parser.add_argument("--json", type=Path, help="write every run's figures to this file")
    arguments = parser.parse_args()
    if arguments.engines is None:
        wanted = {None, *PEERS} if arguments.peers else {None}
        arguments.engines = [name for name, engine in ENGINES.items() if engine.peer in wanted]
    if unknown := set(arguments.engines) - ENGINES.keys():
        parser.error(f"no engine is named {', '.join(sorted(unknown))}: choose from {', '.join(ENGINES)}")
    if arguments.rounds < 3:
        parser.error("--rounds must be at least 3, because the median excludes the first round, which starts sessions")
    arguments.peer_venvs = arguments.peer_venvs.absolute()
    return arguments


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
