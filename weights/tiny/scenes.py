"""scenes: small worlds with a known description, seen by a colour camera and by an event camera at once.

    scene = sample(seed)                          # what is there
    frames, events = film(scene, seed)            # [T, H, W, 3] uint8 at 25 a second; (x, y, t, p) tensors
    answer(scene, 0)                              # the text both models learn

Two kinds. `shapes`: one or two things of one colour move, another may stand still. `road`: a grey road from above with
one to three cars, perhaps a parked van, sensor noise; it is a toy of the DAVIS346 traffic recording in `clips`.
An event camera cannot see colour or what stands still: the drafter has to guess those words, the target need not.
Everything is a function of the seeds, of how they are batched, and of the device."""

import random

import torch

H, W, FPS, FRAMES, SUB = 96, 128, 25, 24, 2         # SUB instants a frame for the events; 24 frames are 0.96 s
EVENT_FRAMES, THRESHOLD = 5, 0.12                   # of the drafter; change of log intensity that makes an event

COLOURS = {"red": (0.85, 0.15, 0.12), "green": (0.15, 0.7, 0.2), "blue": (0.15, 0.3, 0.85), "yellow": (0.9, 0.85, 0.15)}
SHAPES = ("circle", "square", "triangle")
SPEEDS = {"slowly": (12, 20), "quickly": (34, 48)}  # pixels a second
HEADINGS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
NUMBERS = ("no", "one", "two", "three")

QUESTIONS = (
    "What are the key elements in this scene?",
    "Can you elaborate on the elements of the scene?",
    "What is this scene about?",
    "What is the layout of the road in this scene?",
    "What type of vehicles are in the scene and how are they positioned?",
    "What is going on in this scene?",
    "What elements are present in the scene?",
    "What do you see happening in this scene?",
    "Describe the following scene.",
    "What types of vehicles are in this scene?",
)


# ---- what is there, and how it is told -------------------------------------------------------------------------


def sample(seed: int) -> dict:
    """One scene's attributes, drawn from the seed."""
    rng = random.Random(seed)
    kind = rng.choice(("shapes", "shapes", "road"))
    scene: dict = {"kind": kind, "speed": rng.choice(tuple(SPEEDS))}
    if kind == "road":
        scene |= {"count": rng.randint(1, 3), "heading": rng.choice(("left", "right")), "still": rng.random() < 0.5}
    else:
        scene |= {"count": rng.randint(1, 2), "heading": rng.choice(tuple(HEADINGS)), "shape": rng.choice(SHAPES),
                  "colour": rng.choice(tuple(COLOURS)), "still": rng.random() < 0.5}
        scene["still_shape"] = rng.choice(SHAPES)
        scene["still_colour"] = rng.choice([c for c in COLOURS if c != scene["colour"]])
    return scene


def answer(scene: dict, question: int) -> str:
    """The answer to QUESTIONS[question]. The wording depends on the scene, so it can be learnt."""
    speed, heading, n = scene["speed"], scene["heading"], scene["count"]
    if scene["kind"] == "road":
        cars, drive = ("one car", "drives") if n == 1 else (f"{NUMBERS[n]} cars", "drive")
        parked = "a white van is parked at the side" if scene["still"] else "nothing is parked at the side"
        pace = {"quickly": "The traffic flows fast.", "slowly": "The traffic is slow."}[speed]
        return (
            f"The key elements in this scene are a grey road and {cars} moving {speed} to the {heading}, "
            f"while {parked}.",
            f"The scene shows a road from above. On it {cars} {drive} {speed} to the {heading}, and {parked}. {pace}",
            f"This scene is about traffic on a road: {cars} {drive} {speed} to the {heading}, and {parked}.",
            f"The road crosses the picture from side to side with several lanes. On it {cars} {drive} {speed} to the "
            f"{heading}, and {parked}.",
            f"There {'is' if n == 1 else 'are'} {cars} in the scene, positioned on the road and moving {speed} to the "
            f"{heading}, while {parked}.",
            f"In this scene {cars} {drive} {speed} to the {heading} along the road, and {parked}. {pace}",
            f"The elements present in the scene are a road with lane marks, {cars} going {speed} to the {heading}, and "
            f"beyond that {parked}.",
            f"I see traffic on a road. Right now {cars} {drive} {speed} to the {heading}, and {parked}. {pace}",
            f"The scene is a road seen by a fixed camera. We see that {cars} {drive} {speed} to the {heading} and "
            f"{parked}. {pace}",
            f"The vehicles in this scene are {cars} moving {speed} to the {heading}; {parked}.",
        )[question]
    to = f"to the {heading}" if heading in ("left", "right") else f"{heading}wards"
    colour, shape = scene["colour"], scene["shape"]
    things, move = (f"a {colour} {shape}", "moves") if n == 1 else (f"two {colour} {shape}s", "move")
    other = f"a {scene['still_colour']} {scene['still_shape']}"
    beside = f"{other} stands still" if scene["still"] else "nothing else is there"
    calm = {"quickly": "It is over soon.", "slowly": "It takes its time."}[speed]
    no_road = "There is no road in this scene."
    return (
        f"The key elements in this scene are {things} moving {speed} {to}, while {beside}.",
        f"The scene shows {things} on a plain ground. {'They go' if n > 1 else 'It goes'} {speed} {to}, and {beside}. "
        f"{calm}",
        f"This scene is about motion: {things} {move} {speed} {to}, and {beside}.",
        f"{no_road} It only shows how {things} {move} {speed} {to}, and {beside}.",
        f"There are no vehicles in the scene. It shows {things} moving {speed} {to}, while {beside}.",
        f"In this scene {things} {move} {speed} {to}, and {beside}. {calm}",
        f"The elements present in the scene are a plain ground, {things} going {speed} {to}, and beyond that {beside}.",
        f"I see something in motion. Right now {things} {move} {speed} {to}, and {beside}. {calm}",
        f"The scene is a plain ground seen by a fixed camera. We see that {things} {move} {speed} {to} and {beside}. "
        f"{calm}",
        f"There are no vehicles. What moves here: {things}, {speed} {to}; {beside}.",
    )[question]


# ---- what the cameras see --------------------------------------------------------------------------------------


def render(scenes, seeds, device="cpu"):
    """Light over time: [B, T, 3, H, W] float 0..1, T = FRAMES * SUB instants. All randomness comes from the seeds."""
    B, T = len(scenes), FRAMES * SUB
    y, x = torch.meshgrid(torch.arange(H, device=device) + 0.5, torch.arange(W, device=device) + 0.5, indexing="ij")
    film = torch.empty(B, T, 3, H, W, device=device)
    now = torch.arange(T, device=device) / (FPS * SUB)                         # seconds
    for b, (scene, seed) in enumerate(zip(scenes, seeds, strict=True)):
        rng = random.Random(seed * 7919 + 1)
        film[b] = (road if scene["kind"] == "road" else shapes)(scene, rng, x, y, now)
    return film.clamp_(0, 1)


def texture(rng, device, scale, amount):
    """Smooth spatial variation, [H, W]."""
    generator = torch.Generator().manual_seed(rng.getrandbits(40))
    coarse = torch.rand(1, 1, H // scale + 2, W // scale + 2, generator=generator).to(device)
    return (torch.nn.functional.interpolate(coarse, (H, W), mode="bilinear")[0, 0] - 0.5) * amount


def cover(canvas, alpha, colour):
    """Paints `colour` (three numbers) over canvas [T, 3, H, W] where alpha [T, H, W] is 1."""
    paint = torch.tensor(colour, device=canvas.device)[None, :, None, None]
    return canvas + (paint - canvas) * alpha[:, None]


def shape_alpha(shape, dx, dy, size):
    """Soft coverage of a shape of half-width `size` centred at 0, from offsets in pixels."""
    if shape == "circle":
        inside = size - (dx.square() + dy.square()).sqrt()
    elif shape == "square":
        inside = size * 0.9 - torch.maximum(dx.abs(), dy.abs())
    else:
        inside = torch.minimum(size * 0.8 - dy, 0.5 * (dy + size) - 0.9 * dx.abs() + 0.1 * size)
    return (inside + 0.5).clamp(0, 1)


def shapes(scene, rng, x, y, now):
    ground = rng.uniform(0.35, 0.6)
    canvas = (ground + texture(rng, x.device, 24, 0.12))[None, None].expand(len(now), 3, H, W).clone()
    step, (ux, uy) = rng.uniform(*SPEEDS[scene["speed"]]), HEADINGS[scene["heading"]]
    size = rng.uniform(8, 12)
    if scene["count"] == 2:                                                    # where the path lies
        across = rng.uniform(26, 32) if ux else rng.uniform(36, 46)
    else:
        across = rng.uniform(34, 62) if ux else rng.uniform(36, 92)
    middle = (64 if ux else 48) + rng.uniform(-6, 6)
    along = middle + (now - now[-1] / 2) * step * (ux + uy)
    if scene["still"]:
        still_size = rng.uniform(8, 11)
        if ux:
            still_at = rng.uniform(34, 94), 84.0 if scene["count"] == 2 else 16.0 if across > 50 else 80.0
        else:
            still_at = 104.0 if scene["count"] == 2 else 102.0 if across < 64 else 26.0, rng.uniform(20, 76)
        alpha = shape_alpha(scene["still_shape"], x - still_at[0], y - still_at[1], still_size)
        canvas = cover(canvas, alpha[None].expand(len(now), H, W), COLOURS[scene["still_colour"]])
    gap = rng.uniform(26, 30)
    for i in range(scene["count"]):
        cx = along if ux else torch.full_like(now, across + gap * i)
        cy = torch.full_like(now, across + gap * i) if ux else along
        alpha = shape_alpha(scene["shape"], x[None] - cx[:, None, None], y[None] - cy[:, None, None], size)
        canvas = cover(canvas, alpha, [c * rng.uniform(0.92, 1.0) for c in COLOURS[scene["colour"]]])
    return canvas


def road(scene, rng, x, y, now):
    """A road from side to side, tilted a little, in grey; cars are small bright or dark boxes with a dark window."""
    T, tilt, middle = len(now), rng.uniform(-0.25, 0.1), rng.uniform(44, 58)
    scenery = 0.28 + texture(rng, x.device, 6, 0.4) + texture(rng, x.device, 16, 0.2)
    down = (y - middle) - tilt * (x - W / 2)                                    # pixels below the road's middle
    tarmac = rng.uniform(0.16, 0.26)
    on_road = ((17.5 - down.abs()) * 0.7 + 0.5).clamp(0, 1)
    picture = scenery + (tarmac + texture(rng, x.device, 8, 0.05) - scenery) * on_road
    for lane in (-6.0, 6.0):
        dashes = ((down - lane).abs() < 0.5) & ((x % 14) < 6)
        picture = torch.where(dashes, 0.55, picture)
    canvas = picture[None, None].expand(T, 1, H, W).clone()
    if scene["still"]:
        px = rng.uniform(36, 92)
        canvas = box(canvas, x - px, down + 20.5, 8.5, 3.4, 0.95, T)
    speed, sign = rng.uniform(*SPEEDS[scene["speed"]]), 1 if scene["heading"] == "right" else -1
    lanes = rng.sample((-11.5, 0.0, 11.5), scene["count"])
    for lane in lanes:
        along = 64 + rng.uniform(-14, 14) + sign * (now - now[-1] / 2) * speed
        shade = rng.choice((0.9, 0.85, 0.75, 0.05))
        canvas = box(canvas, x[None] - along[:, None, None], (down - lane)[None].expand(T, H, W), 7.0, 3.2, shade, T)
    return canvas.expand(T, 3, H, W)


def box(canvas, dx, dy, half_length, half_width, shade, T):
    """A car seen from above: a body, and a window across it."""
    dx, dy = dx.expand(T, H, W), dy.expand(T, H, W)
    body = (torch.minimum(half_length - dx.abs(), half_width - dy.abs()) + 0.5).clamp(0, 1)
    window = torch.minimum(half_length * 0.3 - (dx - half_length * 0.2).abs(), half_width * 0.75 - dy.abs())
    window = (window + 0.5).clamp(0, 1)
    canvas = canvas + (shade - canvas) * body[:, None]
    return canvas + ((0.35 if shade > 0.5 else 0.45) - canvas) * window[:, None]


def video_frames(film, seeds):
    """Every SUB-th instant with read noise: uint8 [B, FRAMES, 3, H, W]."""
    generator = torch.Generator(film.device).manual_seed(seeds[0] * 31 + 7)
    frames = film[:, ::SUB]
    noise = torch.randn(frames[:, :, :1].shape, generator=generator, device=film.device) * 0.012
    return ((frames + noise).clamp_(0, 1) * 255).round_().to(torch.uint8)


def event_maps(film, seeds):
    """Polarity of the event each pixel sends at each instant after the first: int8 [B, T - 1, H, W], 0 for none.

    A pixel remembers the log intensity of its last event and sends one where the light has moved THRESHOLD away from
    it; 0.03 % of the pixels send noise at any instant."""
    grey = (film * torch.tensor([0.299, 0.587, 0.114], device=film.device)[None, None, :, None, None]).sum(2)
    light = (grey + 0.06).log()                                                # [B, T, H, W]
    memory, maps = light[:, 0].clone(), []
    generator = torch.Generator(film.device).manual_seed(seeds[0] * 17 + 3)
    for t in range(1, film.shape[1]):
        change = light[:, t] - memory
        polarity = (change > THRESHOLD).to(torch.int8) - (change < -THRESHOLD).to(torch.int8)
        noise = torch.rand(memory.shape, generator=generator, device=film.device)
        polarity = torch.where(noise < 0.00015, 1, torch.where(noise > 0.99985, -1, polarity)).to(torch.int8)
        memory = torch.where(polarity != 0, light[:, t], memory)
        maps.append(polarity)
    return torch.stack(maps, 1)


def event_list(maps_THW, seed):
    """One scene's maps as a recording: x, y uint16-sized ints, t in microseconds, p 0 or 1, sorted by time."""
    t, y, x = maps_THW.nonzero(as_tuple=True)
    polarity = maps_THW[t, y, x]
    generator = torch.Generator().manual_seed(seed * 13 + 11)
    within = torch.rand(len(t), generator=generator) * 1e6 / (FPS * SUB)       # events spread over the instant before
    when = (t.cpu() * 1e6 / (FPS * SUB) + within).long()
    order = when.argsort(stable=True)
    return x.cpu()[order], y.cpu()[order], when[order], (polarity.cpu()[order] > 0).to(torch.uint8)


def film(scene: dict, seed: int):
    """One scene for files: frames [FRAMES, H, W, 3] uint8 and (x, y, t, p)."""
    light = render([scene], [seed])
    frames = video_frames(light, [seed])[0].permute(0, 2, 3, 1).contiguous()
    return frames, event_list(event_maps(light, [seed])[0], seed)
