"""One example for each verb: the last line of its `--help`."""

EXAMPLES = {
    "": "atelier demo",
    "demo": "atelier demo --workers 2",
    "example": "atelier example fashion.toml",
    "init": "atelier init --data /shared/FashionDataset",
    "doctor": "atelier doctor fashion.toml --on-node",
    "search": "atelier search fashion.toml --data FashionDataset -o fashion-best.toml",
    "worker": "atelier worker fashion.toml --data FashionDataset --pack 4",
    "confirm": "atelier confirm fashion --folds 6",
    "submit": "atelier submit fashion.toml --data FashionDataset --array 0-7%4 --profile tuning",
    "stop": "atelier stop fashion",
    "logs": "atelier logs fashion --trial 12",
    "status": "atelier status fashion --watch",
    "trials": "atelier trials fashion --csv trials.csv",
    "efficiency": "atelier efficiency fashion",
    "verify": "atelier verify fashion",
    "plot": "atelier plot fashion --kind compare --by lr -o lr.png",
    "report": "atelier report fashion -o report",
    "dashboard": "atelier dashboard --port 8081",
    "export": "atelier export fashion -o fashion-best.toml",
    "train": "atelier train fashion-best.toml --epochs 120",
    "replay": "atelier replay fashion --trial 12",
    "predict": "atelier predict fashion-best.run pictures/ -o prediction.csv",
    "export-model": "atelier export-model fashion-best.run --to onnx -o model",
    "model": "atelier model fashion.toml",
    "data": "atelier data check FashionDataset",
    "data check": "atelier data check FashionDataset",
    "data demo": "atelier data demo demo-data --train 1000 --val 400",
    "db": "atelier db status",
    "db start": "atelier db start --listen 10.0.0.5",
    "db stop": "atelier db stop",
    "db status": "atelier db status",
    "db backup": "atelier db backup atelier.tar",
    "db restore": "atelier db restore atelier.tar",
    "db prune": "atelier db prune fashion --dry-run",
    "db upgrade": "atelier db upgrade",
    "db check": "atelier db check",
    "user": "atelier user add ada --role editor",
    "user add": "atelier user add ada --role editor",
    "user remove": "atelier user remove ada",
    "user list": "atelier user list",
}


def epilog(verb: str) -> str:
    r"""The example of a verb, as the end of its help; \b keeps its line whole. Raises KeyError."""
    return f"\b\nExample: {EXAMPLES[verb]}"
