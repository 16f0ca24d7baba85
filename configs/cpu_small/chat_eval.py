"""What the small model can do, asked on problems that no stage was trained on."""

task_name = "SpellingBee|Arithmetic"
device = "cpu"
batch_size = 64
max_problems = 128
max_new_tokens = 200
