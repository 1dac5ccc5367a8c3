// One unit: a Web Worker that paints its share of a Julia set, every shares-th row. The page hands it a port to the
// conductor, which gives orders and gets the finished rows; the page itself gets each row as it is painted.

let stop = null; // the task that this worker was asked to stop; ids are never used again
let port;

onmessage = ({ data }) => {
  port = data.port;
  port.onmessage = ({ data: order }) => {
    if (order.stop) stop = order.stop;
    else work(order);
  };
};

async function work({ task_id, attempt, share, shares, scene }) {
  try {
    const rows = [];
    for (let y = share; y < scene.height && stop !== task_id; y += shares) {
      const row = { y, shades: paintRow(scene, y) };
      rows.push(row);
      postMessage({ task_id, attempt, row, scene });
      await turn();
    }
    port.postMessage({ task_id, attempt, rows });
  } catch (error) {
    port.postMessage({ task_id, attempt, error: String(error.message ?? error) });
  }
}

// The mean escape time of samples x samples points in each pixel, as shades 0 to 255.
function paintRow({ re, im, width, height, samples }, y) {
  const shades = new Uint8Array(width);
  const step = 3.2 / width;
  for (let x = 0; x < width; x++) {
    let sum = 0;
    for (let i = 0; i < samples * samples; i++) {
      let a = (x + (i % samples) / samples - width / 2) * step;
      let b = (y + Math.floor(i / samples) / samples - height / 2) * step;
      let n = 0;
      for (; n < 96 && a * a + b * b < 4; n++) [a, b] = [a * a - b * b + re, 2 * a * b + im];
      sum += n;
    }
    shades[x] = Math.round(Math.sqrt(sum / (samples * samples) / 96) * 255);
  }
  return shades;
}

// Lets messages in between two rows. (A timer of zero would wait 4 ms in a chain.)
const { port1, port2 } = new MessageChannel();
function turn() {
  return new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
}
