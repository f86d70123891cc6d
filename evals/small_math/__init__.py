"""Grade-school word problems in the form of gsm8k, made here."""
