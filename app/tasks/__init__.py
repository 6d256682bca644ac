"""What supervised training learns: one file per task, each a `SupervisedTask` of app.workers. Adding one is a file here and a stage."""
