// Search on pages opened from a disk. Browsers start no web worker from file: addresses, so there a hidden frame runs
// the search's script instead, with the two messages of a worker passed on by hand.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.waiting = [];
      const start = () => {
        const inside = frame.contentWindow;
        inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
        const script = inside.document.createElement("script");
        script.src = url;
        script.onload = () => {
          this.inside = inside;
          this.waiting.forEach(data => this.postMessage(data));
        };
        inside.document.head.append(script);
      };
      const append = () => { document.body.append(frame); start(); };
      document.body ? append() : addEventListener("DOMContentLoaded", append);
    }

    postMessage(data) {
      if (!this.inside) this.waiting.push(data);
      else this.inside.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {}
  };
}
