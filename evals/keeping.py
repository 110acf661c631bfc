"""Which checkpoints an evaluated run keeps."""

from cluster.config import RunConfig
from cluster.errors import RunError
from cluster.progress import say
from cluster.publishing import is_whole
from cluster.run_folder import RunFolder
from serving.models import best_epoch, published_epochs


def thin_out(run: RunFolder, config: RunConfig) -> None:
    """Remove the checkpoints that training.keep lets go, once those that stay are proved whole.

    Comes after the evaluation: until then each epoch's student may be asked for the next one's
    negatives, and is evaluated. Raises RunError where one that stays is damaged, and removes none.
    """
    if config.training.keep == "each_epoch":
        return
    kept, epochs = _kept(run, config), range(1, config.training.epochs + 1)
    # A folder without a marker is one that a killed try was removing.
    leaving = [epoch for epoch in epochs if epoch not in kept and run.checkpoint(epoch).exists()]
    for epoch in kept if leaving else ():
        if not is_whole(run.checkpoint(epoch)):
            raise RunError(
                f"{run.checkpoint(epoch)} is to stay and is damaged, so no other is removed: run "
                "the same command again, which makes it anew"
            )
    if leaving:
        run.remove_checkpoints(leaving)
        shown = ", ".join(map(str, leaving))
        say(f"checkpoints of epoch {shown} removed (training.keep={config.training.keep})")


def _kept(run: RunFolder, config: RunConfig) -> list[int]:
    """The last epoch, from which a recipe's next stage starts, and the best one where asked."""
    best = None
    if config.training.keep == "best_and_last":
        best = best_epoch(run, published_epochs(run, config))
    return sorted({config.training.epochs, best or config.training.epochs})
