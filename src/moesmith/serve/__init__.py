"""An OpenAI-compatible server over one packed model and any number of adapters."""
