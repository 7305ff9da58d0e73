// Numbers in half precision, as text: what the weights of a network take least room in.

/** The bytes that a text in base 64 stands for. */
export function bytesOf(base64) {
  const characters = atob(base64);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

/** A float16 has 1 bit for the sign, 5 for the exponent and 10 for the fraction. */
export function floatOf(half) {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** -24; // below the smallest normal one
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** Little-endian float16 numbers in base 64 -> Float32Array. */
export function readHalf(base64) {
  const bytes = bytesOf(base64);
  const numbers = new Float32Array(bytes.length / 2);
  for (let i = 0; i < numbers.length; i++) {
    numbers[i] = floatOf(bytes[2 * i] | (bytes[2 * i + 1] << 8));
  }
  return numbers;
}
