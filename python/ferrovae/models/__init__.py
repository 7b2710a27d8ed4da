"""The models: compositions of encoder, decoder, likelihood and prior."""
