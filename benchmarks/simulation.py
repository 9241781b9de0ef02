"""Run one job with a bare loop, fedpool and other frameworks, and print the cost of each.

Every engine is a process of its own, measured from outside: total time from start to exit, the time
between the first site receiving one round and the next, and the peak summed PSS of all its
processes.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from measure import BEFORE, PEERS, Case, Engine, EngineError, Sample, find_pythons, run_engine
from tables import report, report_growth

LARGE_ROUNDS = 4
MANY_SITES = (100, 1000)
ENGINES = {
    "bare": Engine("bare.py"),
    "fedpool": Engine("fedpool_job.py"),
    "fedpool-before": Engine("fedpool_job.py", peer=BEFORE),
    "flower": Engine("flower_job.py", peer="flower"),
    "nvflare": Engine("nvflare_job.py", peer="nvflare", per_site=True, max_sites=16),
    "nvflare-threads": Engine("nvflare_job.py", peer="nvflare", max_sites=100),
}


def main() -> None:
    """Run the chosen cases, print a table for each, and exit with 1 if an engine failed."""
    arguments = _arguments()
    pythons = find_pythons({name: ENGINES[name] for name in arguments.engines}, arguments.peer_venvs)
    cases = [Case("digits", "digits", arguments.sites, arguments.rounds)]
    if arguments.large:
        cases.append(Case("large, 300 MB of weights", "large", arguments.sites, LARGE_ROUNDS))
    if arguments.many:
        cases += [Case("many", "digits", num_sites, 1, cold_sites=True) for num_sites in MANY_SITES]
    results: dict[Case, dict[str, list[Sample]]] = {}
    failures = 0
    for case in cases:
        names = [name for name in arguments.engines if case.num_sites <= ENGINES[name].max_sites]
        results[case] = {name: [] for name in names}
        for repeat in range(arguments.repeat):  # engine after engine, so that a slow minute affects all of them
            for name in names:
                _note(f"{case.title}, {case.num_sites} sites: {name}, run {repeat + 1} of {arguments.repeat}")
                try:
                    sample = run_engine(ENGINES[name], case, pythons[name], arguments.threads, arguments.timeout_s)
                    results[case][name].append(sample)
                except EngineError as error:
                    failures += 1
                    _note(f"{name} failed: {error}")
        print("\n".join(report(case, results[case])), flush=True)
    if arguments.many:
        few, many = cases[-len(MANY_SITES) :]
        print("\n".join(report_growth(few, results[few], many, results[many])))
    if arguments.json:
        runs = [
            {**asdict(case), "engine": name, "num_threads": arguments.threads, **asdict(sample)}
            for case, engines in results.items()
            for name, samples in engines.items()
            for sample in samples
        ]
        arguments.json.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    sys.exit(failures > 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2, help="sites that train at the same time")
    parser.add_argument("--repeat", type=int, default=1, help="runs of every engine; the table has their medians")
    parser.add_argument("--peers", action="store_true", help="also NVFlare and Flower")
    parser.add_argument("--large", action="store_true", help="also a model of 300 MB")
    parser.add_argument("--many", action="store_true", help=f"also {MANY_SITES[0]} and {MANY_SITES[-1]} sites")
    parser.add_argument("--engines", type=lambda text: text.split(","), help=f"only these, of {','.join(ENGINES)}")
    parser.add_argument(
        "--peer-venvs",
        type=Path,
        default=Path(__file__).resolve().parents[1] / ".venvs",
        help="folder with the virtual environments nvflare/, flower/ and before/",
    )
    parser.add_argument("--timeout-s", type=float, default=1800)
    parser.add_argument("--json", type=Path, help="write every run's figures to this file")
    arguments = parser.parse_args()
    if arguments.engines is None:
        wanted = {None, *PEERS} if arguments.peers else {None}
        arguments.engines = [name for name, engine in ENGINES.items() if engine.peer in wanted]
    if unknown := set(arguments.engines) - ENGINES.keys():
        parser.error(f"no engine is named {', '.join(sorted(unknown))}: choose from {', '.join(ENGINES)}")
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, because a round's time is measured between two rounds")
    arguments.peer_venvs = arguments.peer_venvs.absolute()
    return arguments


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
