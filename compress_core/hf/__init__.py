"""Everything that knows HuggingFace: importing this teaches transformers the compressed format.

After it, `AutoModelForCausalLM.from_pretrained(FOLDER)` gives the stock class with factored layers.
"""

import compress_core.hf.counting  # noqa: F401  before all that reads the variables it sets
from compress_core.folder.load import register

register()
