"""Point out an encoder that was made for images of another size: it runs, and wastes time or sees nothing."""

from cnnjepa.config import CELL_PIXELS, VITS, EncoderName, TrainConfig, grid_size

_SMALL_UP_TO = 96  # pixels; above, a map of resnet_small has more than 12 x 12 cells
_FEWEST_CELLS = 3  # per side of a map that keeps any place in the image apart


def size_line(config: TrainConfig) -> str:
    """Return a warning if the cells of the encoder do not suit the size of the images, or ""."""
    name, size = config.encoder.name, config.data.image_size
    if name in VITS:
        return ""  # its cells are a key of their own
    cells, cell = grid_size(config), CELL_PIXELS[name]
    lead = f"encoder.name={name.name} has cells of {cell} pixels"
    if name is EncoderName.resnet_small and size > _SMALL_UP_TO:
        times = (CELL_PIXELS[EncoderName.resnet18] // cell) ** 2
        more = f"at data.image_size={size} its map has {cells}x{cells}, {times} times as many as that of resnet18, which is made for them"
        return f"{lead}, for images of up to {_SMALL_UP_TO} pixels: {more}"
    if name is not EncoderName.resnet_small and cells < _FEWEST_CELLS:
        return f"{lead}: of data.image_size={size} its map keeps {cells}x{cells}; resnet_small is made for images so small"
    return ""
