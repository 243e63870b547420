"""One module per published system, named after its slug with `_` for `-`.

An adapter rebuilds the system with regard from a golden file's kwargs, weights and inputs, and compares:

    from tests.parity.harness import Comparison, Golden

    def check(golden: Golden) -> Iterable[Comparison]:
        layer = regard.from_official("my-system", golden.state(), **golden.kwargs)
        yield golden.compare("y", layer(golden.inputs["x"]), atol=1e-5)

Every `out/…` and `grad/…` key of the file must be compared. One that cannot be goes into the module's `NOT_COMPARED`,
a dict from key pattern (as in `fnmatch`) to the reason, which is printed with the results.
"""
