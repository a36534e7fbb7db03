"""The kinds of state that a program may forget, what each is called, and how to keep it."""

from enum import Enum

_MODULE = "Save {name} as state_dict(), which holds the buffers too, and not its parameters alone."


def _random(of: str, how: str) -> tuple[str, str]:
    return f"{of} random state", f"Save {{name}} ({how}) and restore it, or draw from the seed and the step."


class Kind(Enum):
    """A kind of state: its title, and the fix in one sentence where there is one."""

    optimizer = (
        "optimizer moments",
        "Save {name} with the model (a torch optimizer: its state_dict()), and load it before the first step.",
    )
    scheduler = (
        "scheduler",
        "Save {name} (a torch scheduler: its state_dict()) and load it, or compute the rate from the saved step.",
    )
    rate = ("learning rate", "Save the optimizer's param_groups and the scheduler, and load both before the first step.")
    sampler = ("sampler position", "Save where the data stand ({name}), and continue there: after the last batch that was trained on.")
    order = ("data order", "Save what decides the order of the data ({name}), or draw each epoch's order from the seed and the epoch.")
    python = _random("Python", "getstate(), setstate()")
    numpy = _random("NumPy", "bit_generator.state or np.random.get_state()")
    torch = _random("torch", "get_rng_state() or get_state()")
    average = ("EMA", "Save {name}, part of the average of the weights, and load it; do not begin with the trained weights again.")
    statistics = ("BatchNorm buffers", _MODULE)
    scaler = ("loss scaler", "Save {name} (a GradScaler: its state_dict()) and load it.")
    weights = ("weights", "Save {name} and load it before the first step.")
    buffer = ("buffers of a module", _MODULE)
    array = ("array", "Save {name} and restore it.")
    value = ("variable", "Save {name} and restore it.")
    clock = ("clock", "Let no time of day and no elapsed time change what is computed: use the step, and a fixed seed.")
    hashing = ("order of a set or a hash", "Sort what comes from a set, and do not use hash() of a text: both differ in each process.")
    unseeded_python = ("Python random state", "Call random.seed(config.seed) before anything is drawn.")
    unseeded_numpy = ("NumPy random state", "Call np.random.seed(config.seed) before anything is drawn.")
    unseeded_torch = ("torch random state", "Call torch.manual_seed(config.seed) before anything is drawn.")
    entropy = ("generator without a seed", "Give each random generator a seed: default_rng(config.seed), Random(config.seed).")
    chance = (
        "something that differs by itself",
        "Look for threads that race, atomic operations of a GPU, and for files or services that change; then run the drill again.",
    )
    unknown = (
        "something that was not found",
        "Look for what is not reachable from the variables of train: an iterator that is used up, a process, a file.",
    )

    @property
    def title(self) -> str:
        """Return what it is called in a report."""
        return str(self.value[0])

    def fix(self, name: str) -> str:
        """Return what to do about it in one sentence."""
        return str(self.value[1]).format(name=name or "it")
