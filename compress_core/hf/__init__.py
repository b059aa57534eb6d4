"""Everything that knows HuggingFace: importing this teaches transformers the compressed format.

After it, `AutoModelForCausalLM.from_pretrained(FOLDER)` gives the stock class with factored layers.
"""

from compress_core.hf.quantizer import register

register()
