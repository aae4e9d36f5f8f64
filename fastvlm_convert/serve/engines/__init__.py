"""Who runs the bundles: this process, child processes, or Ray; all behind `serve.engine.Engine`."""
