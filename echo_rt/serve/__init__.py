"""One live video for any number of viewers: a page, an API and the server behind them."""
