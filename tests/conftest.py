"""Settings that must stand before JAX is imported: eight CPU devices, strict rank promotion,
nothing fetched from a hub. What one test has compiled, every other one reads, also in another
process; it is compiled with little care, which takes half the time and gives slower programs. What
`make test` sets is taken away: messages name make only to those who came by it.
"""

import os
import sys
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
_EMITTERS = "xla_cpu_use_fusion_emitters"  # they take three quarters of the time of a compilation
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --{_EMITTERS}=false"
    " --xla_force_host_platform_device_count=8"
).strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers have theirs from here
    _COMPILED = tempfile.TemporaryDirectory(prefix="ictjax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _COMPILED.name
os.environ.pop("MAKELEVEL", None)


@pytest.fixture(scope="module", autouse=True)
def _settings_are_put_back():
    """A module that leaves JAX set otherwise would slow down or change those after it."""
    jax = sys.modules.get("jax")
    before = {} if jax is None else dict(jax.config.values)
    yield
    assert before == {name: jax.config.values[name] for name in before}


@pytest.fixture(scope="module")
def optimised():
    """Programs of this module are compiled as users' are."""
    import jax  # after the settings above
    from jax._src import compiler

    options_of_tests = compiler.get_compile_options

    def options_of_users(*args, env_options_overrides=None, **options):
        overrides = {_EMITTERS: True} | (env_options_overrides or {})
        return options_of_tests(*args, env_options_overrides=overrides, **options)

    with pytest.MonkeyPatch.context() as here:
        here.setattr(compiler, "get_compile_options", options_of_users)
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)
