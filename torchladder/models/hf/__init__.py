"""Models to and from Hugging Face's form: safetensors shards, a config.json, and the tokenizer beside them."""
