// A black square to draw white lines on, with mouse, pen or finger. The component's value is the drawing, a PNG as a
// data URL; it stays in memory, and no file is uploaded.
const canvas = element.querySelector("canvas"), paper = canvas.getContext("2d");
let last = null; // where the pen was, in the canvas's own pixels

function clear() {
  paper.fillStyle = "black";
  paper.fillRect(0, 0, canvas.width, canvas.height);
}

function hand_over() {
  props.value = canvas.toDataURL("image/png");
  trigger("input");
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
}

function line_to(point) {
  paper.strokeStyle = "white";
  paper.lineCap = "round";
  paper.lineWidth = canvas.width / 100; // 1 % of the side, as in fill50k
  paper.beginPath();
  paper.moveTo(...last);
  paper.lineTo(...point);
  paper.stroke();
  last = point;
}

clear();
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
  line_to(last); // a dot
});
canvas.addEventListener("pointermove", (event) => last && line_to(place(event)));
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (last) hand_over();
    last = null;
  });
}
element.querySelector("button").addEventListener("click", () => {
  clear();
  hand_over();
});
