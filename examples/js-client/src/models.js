/** The models on offer, and how what the form holds becomes the input that each of them takes. */
export const MODELS = [
  {
    id: "fal-ai/flux-pro/kontext",
    name: "Kontext",
    purpose: "Changes a picture of yours",
    placeholder: "Make it a rainy evening, keep the faces",
    takesPicture: true,
    toInput: ({ prompt, imageUrl }) => ({ prompt, image_url: imageUrl }),
  },
  {
    id: "fal-ai/flux/dev",
    name: "FLUX dev",
    purpose: "Paints from words alone",
    placeholder: "A lighthouse in thick fog, oil on canvas",
    takesPicture: false,
    toInput: ({ prompt }) => ({ prompt }),
  },
];
