"""The sampler: jitted prefill and decode (`device`) and the host's scheduler of rows (`engine`)."""
