"""The run that tests beside PEFT make, whatever the network: its schedule and scaling."""

SETTINGS = {
    "init_r": 4,
    "target_r": 2,
    "tinit": 4,
    "tfinal": 6,
    "deltaT": 3,
    "total_step": 30,
    "lora_alpha": 6,
    "orth_reg_weight": 0.3,
    "init_lora_weights": False,
}
