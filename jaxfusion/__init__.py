"""jaxfusion: multilingual encoders in front of English-centric LLMs, in JAX."""
