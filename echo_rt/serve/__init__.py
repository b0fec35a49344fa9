"""One live video for any number of viewers: a page, an API and the server behind them.

The server knows a video as a :class:`~echo_rt.serve.session.Session`, which may run in another process;
:class:`~echo_rt.serve.live.LiveSession` runs it in this one.
"""
