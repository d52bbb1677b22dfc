"""``dask nlsq``: the commands that this package adds to Dask's own.

Commands import what they need when they run, so that ``dask --help`` stays fast.
"""

import click


@click.group(name="nlsq")
def nlsq():
    """Nonlinear least squares for data that do not fit in memory."""


@nlsq.command()
@click.option("--frames", default=200, show_default=True, help="Frames n per angle; 1000 give 23 million points.")
@click.option("--angles", default=23, show_default=True, help="Angles between -90 and 90 degrees.")
@click.option("--seed", default=0, show_default=True, help="Of the truth per angle, the start and the noise.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False),
    help="Where the Zarr stores and the picture go and stay; a new temporary directory if not given.",
)
def demo(frames, angles, seed, directory):
    """Simulate a beamline measurement in a Zarr store, fit it, and compare with the truth.

    Exits with status 1 where the fit misses it.
    """
    try:
        from .demo import run

        run(frames=frames, n_angles=angles, seed=seed, directory=directory, echo=click.echo)
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as err:
        raise click.ClickException(" ".join(f"{err}".split())) from err
