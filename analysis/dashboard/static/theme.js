// The theme: that of the system, or the one that somebody chose; colours for canvases.

const NEXT = { system: "light", light: "dark", dark: "system" };

export function chosenTheme() {
  try {
    const name = localStorage.getItem("residua-theme");
    return name in NEXT ? name : "system";
  } catch {
    return "system";
  }
}

function applyTheme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
}

export function isDark() {
  const name = document.documentElement.dataset.theme;
  return name ? name === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// The button goes round system, light and dark; pictures listen to `themechange` on the window.
export function startTheme(button) {
  const show = () => {
    applyTheme(chosenTheme());
    button.textContent = `Theme: ${chosenTheme()}`;
  };
  const announce = () => window.dispatchEvent(new Event("themechange"));
  button.addEventListener("click", () => {
    try {
      localStorage.setItem("residua-theme", NEXT[chosenTheme()]);
    } catch {
      return;
    }
    show();
    announce();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", announce);
  show();
}

export function themeColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// Colour scales: a number from 0 to 1 (or from -1 to 1) to a colour.

const BLUES = {
  light: ["#f7fbff", "#d3e4f3", "#9ac7e3", "#4f9bcb", "#2171b5", "#08306b"],
  dark: ["#171e26", "#17344f", "#1c5484", "#2f7fbc", "#74b9ea", "#d9eeff"],
};
const RED_TO_BLUE = {
  light: ["#8c1d0f", "#d6604d", "#f4b79c", "#f7f7f7", "#a6cde4", "#3f8ec4", "#0a3f7a"],
  dark: ["#ffb8a3", "#e0664c", "#7c2c1c", "#20262e", "#1c4c74", "#4a9ad4", "#bfe2ff"],
};

function mix(stops, share) {
  const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2);
  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  const [a, b] = [channels(stops[low]), channels(stops[low + 1])];
  return a.map((value, index) => Math.round(value + (b[index] - value) * (place - low)));
}

export function cellColor(share) {
  const [r, g, b] = mix(BLUES[isDark() ? "dark" : "light"], share);
  return `rgb(${r},${g},${b})`;
}

export function differenceColor(share) {
  const [r, g, b] = mix(RED_TO_BLUE[isDark() ? "dark" : "light"], (share + 1) / 2);
  return `rgb(${r},${g},${b})`;
}

// Black or white, whichever is read more easily on `color`.
export function textOn(color) {
  const [r, g, b] = color.match(/\d+/g).map((value) => {
    const c = Number(value) / 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  const luminance = 0.2126 * r + 0.7152 * g + 0.0722 * b;
  return luminance > 0.179 ? "#000000" : "#ffffff";
}

// Colours of kinds of probes: the palette of Okabe and Ito; light ones for the dark theme.
const PROBES = {
  logit: ["#b84a00", "#ff9a4d"], ridge: ["#0072b2", "#5cb8f0"], lens: ["#00795a", "#38c99b"],
  future: ["#a8478a", "#ec9ccb"], vocab: ["#946500", "#f0b93a"], bigram: ["#555555", "#b5b5b5"],
  unigram: ["#767676", "#8f8f8f"], trigram: ["#000000", "#ffffff"], marginal: ["#7543a0", "#bf94e4"],
  chain: ["#7a6a2f", "#cdbd83"], lagged: ["#7d5a1e", "#c79b5d"], basis: ["#0072b2", "#5cb8f0"],
  pca: ["#b84a00", "#ff9a4d"], random: ["#555555", "#b5b5b5"],
};
const OTHERS = [["#0072b2", "#5cb8f0"], ["#b84a00", "#ff9a4d"], ["#00795a", "#38c99b"],
  ["#a8478a", "#ec9ccb"], ["#946500", "#f0b93a"], ["#7543a0", "#bf94e4"]];

export function probeColor(kind, number = 0) {
  const pair = PROBES[kind] ?? OTHERS[number % OTHERS.length];
  return pair[isDark() ? 1 : 0];
}

export const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [4, 2]];
