"""The size of JAX arrays for Dask, which would otherwise count their Python objects alone (0.7 kB for any array)."""


def register(sizeof):
    """Entry point of the group ``dask.sizeof``; JAX is not imported before an array of it appears."""

    @sizeof.register_lazy("jaxlib")
    def register_jax():
        import jax

        @sizeof.register(jax.Array)
        def array_nbytes(array):
            return array.nbytes
