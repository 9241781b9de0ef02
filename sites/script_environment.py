"""The environment of client scripts at a real site: an allow-list, as the worker's has secrets.

The worker's own environment has the server's password, the store's keys, and whatever else its
operator put there. Scripts come from outside, so they get what Python, the libraries of numbers and
the devices need, and what the operator lists in `script_environment`.
"""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

_NEEDED = (
    "PATH",
    "LANG",
    "LANGUAGE",
    "LC_*",
    "TZ",
    "TMPDIR",
    "USER",
    "LOGNAME",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "DO_NOT_TRACK",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    # Python's, except for those that run code: PYTHONSTARTUP, PYTHONINSPECT, PYTHONBREAKPOINT.
    "PYTHONPATH",
    "PYTHONHOME",
    "PYTHONUSERBASE",
    "PYTHONNOUSERSITE",
    "PYTHONHASHSEED",
    "PYTHONWARNINGS",
    "PYTHONFAULTHANDLER",
    "PYTHONIOENCODING",
    "PYTHONUTF8",
    "PYTHONMALLOC",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONPYCACHEPREFIX",
    # devices and threads
    "CUDA_*",
    "CUBLAS_*",
    "CUDNN_*",
    "NVIDIA_*",
    "NCCL_*",
    "HIP_*",
    "HSA_*",
    "ROCR_*",
    "GLOO_*",
    "TORCH_*",
    "PYTORCH_*",
    "OMP_*",
    "GOMP_*",
    "KMP_*",
    "MKL_*",
    "OPENBLAS_*",
    "BLIS_*",
    "NUMEXPR_*",
    "VECLIB_*",
)
"""Names of variables, or patterns with a `*`, that every script gets from its worker."""

_WORKERS_OWN = ("PREFECT_API_AUTH_STRING", "FEDPOOL_SITE_STORAGE_OPTIONS")
"""Examples of what no script gets, for patterns such as `P*`."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\*?")


def for_scripts(environment: Mapping[str, str], more: Iterable[str]) -> dict[str, str]:
    """The variables of an environment that client scripts get.

    Args:
        environment: the worker's environment.
        more: names and patterns that the site's operator lists.
    """
    patterns = (*_NEEDED, *more)
    return {
        name: value for name, value in environment.items() if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def check_pattern(pattern: str) -> None:
    """Check an entry of `script_environment`.

    Raises:
        ValueError: it is neither a variable's name nor the beginning of one with a `*`, or it names
            the worker's own settings.
    """
    if not _NAME.fullmatch(pattern):
        raise ValueError(
            f'{pattern!r} is not the name of a variable, or its beginning and a *: write, for example, "HF_HOME" or "MY_*"'
        )
    own = pattern.startswith(("PREFECT_", "FEDPOOL_")) or any(fnmatchcase(name, pattern) for name in _WORKERS_OWN)
    if own:
        raise ValueError(
            f"scripts never get PREFECT_... and FEDPOOL_..., which are the worker's own settings: leave {pattern!r} out"
        )
