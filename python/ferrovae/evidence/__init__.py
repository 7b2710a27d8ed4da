"""log p(x): estimators, diagnostics and bits/dim."""
