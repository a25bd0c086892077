"""Requests over the sampler: a server in OpenAI's formats, and agents that call the model themselves."""
