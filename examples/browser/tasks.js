// What the buttons submit: pictures of Julia sets. The work grows with the units, so that wide tasks do not run shorter.

const PLACES = [
  [-0.8, 0.156], [-0.4, 0.6], [0.285, 0.01], [-0.70176, -0.3842], [-0.835, -0.2321], [-0.7269, 0.1889],
  [0.355, 0.355], [-0.54, 0.54], [-0.162, 1.04], [-0.79, 0.15], [0.11, 0.66], [-1.25, 0.02],
];

export const TENANT = "visitor";

/** A task; options are arguments of park_submit. samples: points per pixel and axis, which is what it costs. */
export function picture({ units = 1, height = 48, samples = Math.round(34 * Math.sqrt(units)), ...options } = {}) {
  const [re, im] = pick(PLACES);
  const jitter = () => (Math.random() - 0.5) / 50;
  const payload = { re: re + jitter(), im: im + jitter(), width: 72, height, samples };
  return { payload, units, tenant: TENANT, ...options };
}

/** Ten tasks of mixed cost and priority; one that may be late, one for later. */
export function tenMixed() {
  const units = shuffled([1, 1, 1, 1, 2, 2, 2, 3, 3, 4]);
  const priorities = shuffled(["low", "low", "low", "normal", "normal", "normal", "normal", "high", "high", "high"]);
  return units.map((n, i) =>
    picture({
      units: n,
      priority: priorities[i],
      ...(i === 8 && { deadline: soon(5), priority: "low" }),
      ...(i === 9 && { run_at: soon(8) }),
    }),
  );
}

function soon(seconds) {
  return new Date(Date.now() + seconds * 1000).toISOString();
}

function pick(list) {
  return list[Math.floor(Math.random() * list.length)];
}

function shuffled(list) {
  const left = [...list];
  return list.map(() => left.splice(Math.floor(Math.random() * left.length), 1)[0]);
}
