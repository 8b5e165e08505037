"use strict";
// Of curves: what the report and LLaMA Board share.

function shown(value, unit) {
  const size = Math.abs(value);
  if (unit === "share") return `${(100 * value).toPrecision(size >= 0.1 ? 3 : 2)} %`;
  if (unit === "GiB") return `${value.toFixed(2)} GiB`;
  if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: size >= 1000 ? 6 : 4 });
}

function smoothed(x, y, smoothing) {
  // An average whose weight falls with the distance in steps, as a share of the run: thinning does not change it.
  if (smoothing === 0 || x.length < 3) return y;
  const span = x[x.length - 1] - x[0] || 1;
  let sum = 0, weight = 0;
  return y.map((value, i) => {
    const kept = i === 0 ? 0 : smoothing ** ((100 * (x[i] - x[i - 1])) / span);
    sum = sum * kept + value;
    weight = weight * kept + 1;
    return sum / weight;
  });
}

function nearest(x, step) {
  let low = 0, high = x.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - x[low - 1] < x[low] - step ? low - 1 : low;
}
